"""How much each parameter of a sweep has mattered: PED-ANOVA (Watanabe et al. 2023), as Optuna has it."""

import warnings
from collections.abc import Sequence

import optuna
from optuna.importance import PedAnovaImportanceEvaluator

from pipeline.objectives import Objectives
from pipeline.search_space import SearchSpace
from pipeline.searchers import new_study, told_trial
from pipeline.trial_book import TrialRecord

FEWEST = 6  # trials with a score; of fewer, nothing can be said
# Of the trials that what the best of them have in common is looked for in. Optuna's own tenth is meant for more trials
# than a sweep of trainings has.
BEST_SHARE = 0.25


def importances(trials: Sequence[TrialRecord], space: SearchSpace, objectives: Objectives) -> dict[str, float]:
    """The share of each parameter in what sets the best quarter of the trials apart, by the first objective.

    A parameter that plays a part in some of them only counts where it does. Trials that were stopped count with the
    score that they had then.

    Returns:
        By name, the most important first, with a sum of 1; empty with fewer than `FEWEST` trials, or if all are alike.
    """
    study = new_study(objectives.modes[:1])
    for trial in trials:
        values = objectives.values(trial.metrics)
        if values is not None and space.lacks(trial.parameters) is None:
            study.add_trial(told_trial(space, trial.parameters, values[:1]))
    if len(study.trials) < FEWEST:
        return {}
    evaluator = PedAnovaImportanceEvaluator(target_quantile=BEST_SHARE)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        found = optuna.importance.get_param_importances(study, evaluator=evaluator, normalize=False)
    total = sum(found.values())
    return {name: share / total for name, share in found.items()} if total else {}
