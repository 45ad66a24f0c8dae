"""What lies in the folder of a training run, by name."""

MODEL_FOLDER = "model"
CHECKPOINTS_FOLDER = "checkpoints"
BEST_FOLDER = "best"
HISTORY_FILE = "history.json"
TENSORBOARD_FOLDER = "tensorboard"
PICTURES_FOLDER = "validation"
