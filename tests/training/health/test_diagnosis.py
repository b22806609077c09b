"""The diagnosis of a step that is not finite, by itself. Real runs: `test_trouble.py`."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn

from ibeton.model import ModelConfig, build
from ibeton.pipeline import Batch
from ibeton.training.health.diagnosis import diagnose


@pytest.fixture
def group(tmp_path: Path):  # type: ignore[no-untyped-def]
    """A group in which SyncBatchNorm communicates, which it refuses to do on a CPU."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/init", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_ranks_do_not_communicate(group: None) -> None:
    sizes = {"embed_dim": 32, "depth": 1, "num_heads": 2, "patch_size": 8, "image_size": 32}
    head = {"hidden_dim": 32, "bottleneck_dim": 16, "out_dim": 32, "norm_in_head": "bn"}
    torch.manual_seed(0)
    ibot = build(ModelConfig(**sizes, **head, local_crops_number=1))  # type: ignore[arg-type]
    for network in (ibot.student, ibot.teacher):
        network.head.sync_batch_norm()
    synced = [m for m in ibot.modules() if isinstance(m, nn.SyncBatchNorm)]
    assert synced
    batch = Batch(
        torch.randn(2, 3, 3, 32, 32),
        torch.randn(1, 3, 3, 16, 16),
        torch.rand(2, 3, 4, 4) < 0.3,
        labels=torch.zeros(3, dtype=torch.int64),
        indices=torch.arange(3),
    )
    batch.global_crops[0, 1, 0, 0, 0] = torch.nan
    report = diagnose(ibot, batch, 0, None, 1.0)
    assert report["images"] == report["alone"] == [1]
    assert all(norm.training for norm in synced)
