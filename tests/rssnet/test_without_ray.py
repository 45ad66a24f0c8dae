"""`rssnet` alone: it imports, trains, saves and loads where neither Ray nor the pipeline is installed."""

import subprocess
import sys

SCRIPT = """
import sys

BLOCKED = ("ray", "pipeline", "workflows", "pyarrow", "s3fs", "jsonargparse", "matplotlib", "optuna")


class NotInstalled:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in BLOCKED:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        return None


sys.meta_path.insert(0, NotInstalled())
import torch
import rssnet
from rssnet import LossConfig, RSSNet, RSSNetConfig, RSSNetLoss

config = RSSNetConfig(
    backbone="vit_tiny_patch16_224", backbone_options={"depth": 1}, num_classes=3, image_size=32, decoder_width=16
)
model = RSSNet(config).train()
losses = RSSNetLoss(LossConfig(), 3)(model(torch.randn(2, 3, 32, 32)), torch.zeros(2, 32, 32, dtype=torch.long))
losses["loss"].backward()
model.save_pretrained(sys.argv[1])
RSSNet.from_pretrained(sys.argv[1])
loaded = sorted({name.split(".")[0] for name in sys.modules} & set(BLOCKED))
assert not loaded, loaded
print("trained")
"""


def test_it_trains_saves_and_loads_without_ray(tmp_path):
    run = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(tmp_path / "model")],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.strip() == "trained"
