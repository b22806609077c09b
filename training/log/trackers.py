"""Experiment trackers that get the records of log.jsonl, too: Weights & Biases and MLflow.

Both are optional packages, imported only when asked for. What they cannot take, or a service that
cannot be reached, costs one line on the screen and never the run.
"""

import importlib.util
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

_PACKAGES = {"wandb": "wandb", "mlflow": "mlflow-skinny"}  # tracker and module -> package
TRACKERS = tuple(_PACKAGES)


class _Wandb:
    """One W&B run per training run: a resumed run continues it. WANDB_MODE=offline keeps it in the
    run folder."""

    def __init__(self, name: str, folder: Path, config: dict[str, Any]) -> None:
        import wandb

        self._run: Any = wandb.init(
            project="ibeton", id=name, name=folder.name, dir=str(folder), config=config,
            resume="allow",
        )  # fmt: skip
        # Steps may go back after a rollback, which W&B's own counter does not allow.
        self._run.define_metric("*", step_metric="step")

    def log(self, metrics: dict[str, float], step: int) -> None:
        self._run.log({**metrics, "step": step})

    def close(self) -> None:
        self._run.finish()


class _Mlflow:
    """One MLflow run per training run, found again by its tag; where to is MLFLOW_TRACKING_URI's
    to say."""

    def __init__(self, name: str, folder: Path, config: dict[str, Any]) -> None:
        from mlflow.tracking import MlflowClient

        self._client: Any = MlflowClient()
        found = self._client.get_experiment_by_name("ibeton")
        experiment = found.experiment_id if found else self._client.create_experiment("ibeton")
        same = self._client.search_runs([experiment], f"tags.ibeton_run = '{name}'", max_results=1)
        if same:
            self._id = same[0].info.run_id
            self._client.update_run(self._id, status="RUNNING")
            return
        run = self._client.create_run(experiment, tags={"ibeton_run": name}, run_name=folder.name)
        self._id = run.info.run_id
        for key, value in config.items():
            self._client.log_param(self._id, key, str(value))

    def log(self, metrics: dict[str, float], step: int) -> None:
        for name, value in metrics.items():
            self._client.log_metric(self._id, name, value, step=step)

    def close(self) -> None:
        self._client.set_terminated(self._id)


_Tracker = _Wandb | _Mlflow  # any method may raise
_KINDS: dict[str, Callable[..., _Tracker]] = {"wandb": _Wandb, "mlflow": _Mlflow}


def missing_packages(names: Sequence[str]) -> Iterator[str]:
    """A sentence per tracker of `names` that is not installed."""
    for name in names:
        if name in TRACKERS and importlib.util.find_spec(name) is None:
            yield f"--log-to {name}: not installed; install it: pip install {_PACKAGES[name]}"


class Trackers:
    """The trackers of a run, by name ("wandb", "mlflow"). `run` is the run's identity."""

    def __init__(
        self, names: Sequence[str], run: str, folder: Path, config: dict[str, Any]
    ) -> None:
        self._open: dict[str, _Tracker] = {}
        for name in dict.fromkeys(names):
            try:
                self._open[name] = _KINDS[name](run, folder, config)
            except Exception as error:  # a tracker is never worth a run
                _warn(name, error)

    def record(self, record: dict[str, Any]) -> None:
        """Send the numbers of a record of log.jsonl at its "step"."""
        metrics = dict(numbers(record))
        self._each(lambda tracker: tracker.log(metrics, record["step"]))

    def close(self) -> None:
        """End what the trackers have open."""
        self._each(lambda tracker: tracker.close())
        self._open.clear()

    def _each(self, action: Callable[[_Tracker], None]) -> None:
        """`action` on every tracker; one that fails is dropped."""
        for name, tracker in list(self._open.items()):
            try:
                action(tracker)
            except Exception as error:
                del self._open[name]
                _warn(name, error)


def numbers(record: dict[str, Any]) -> Iterator[tuple[str, float]]:
    """The numbers of a record but its "step"; those of a dict as dict/name."""
    for name, value in record.items():
        inner = value.items() if isinstance(value, dict) else [("", value)]
        for part, number in inner:
            if isinstance(number, int | float) and name != "step":
                yield f"{name}/{part}" if part else name, float(number)


def _warn(name: str, error: Exception) -> None:
    reason = (str(error) or type(error).__name__).splitlines()[0]
    print(f"--log-to {name}: no further records are sent ({reason})", file=sys.stderr)
