"""A training run on disk: checkpoints that are whole or not there, and can be used as models.

    step-00000300/model.safetensors      the weights, by the model's names
    step-00000300/optimizer.safetensors  AdamW's moments and counts, "<weight's name>:<which>"
    step-00000300/average.safetensors    the averaged weights, where there are any
    step-00000300/state.json             the step, the recipe, what was read
    step-00000300/...                    what describes the model, so that `load` takes the folder

A folder gets its name when all of it is on the disk; the one before is removed after that. So there
is a whole one at any moment, whatever stops the process. Nothing is a pickle.
"""

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
from torch import Tensor

from llmcore.storage import whole

WEIGHTS_FILE, OPTIMIZER_FILE = "model.safetensors", "optimizer.safetensors"
AVERAGE_FILE, STATE_FILE = "average.safetensors", "state.json"
FORMAT = 1


@dataclass(frozen=True)
class Checkpoint:
    """Where a run stands behind `step` updates.

    weights, optimizer, average   tensors by name; average is None without one
    state                         JSON: what else the run wants back
    """

    step: int
    weights: Mapping[str, Tensor]
    optimizer: Mapping[str, Tensor]
    average: Mapping[str, Tensor] | None
    state: Mapping[str, Any]

    def write(self, folder: Path, describe: Callable[[Path], object] | None = None) -> Path:
        """Into `folder`/step-<step>, in the place of all older ones; its path.

        describe  adds files that say what model this is
        """
        target = folder / f"step-{self.step:08d}"
        older = [path for path in found_in(folder) if path != target]
        if target.exists():
            return target  # the same run was here before: the same bits
        with whole(target) as part:
            part.mkdir()
            safetensors.torch.save_file(
                _contiguous(self.weights), part / WEIGHTS_FILE, metadata={"format": "pt"}
            )
            safetensors.torch.save_file(_contiguous(self.optimizer), part / OPTIMIZER_FILE)
            if self.average is not None:
                safetensors.torch.save_file(_contiguous(self.average), part / AVERAGE_FILE)
            state = {"format": FORMAT, "step": self.step, **self.state}
            (part / STATE_FILE).write_text(json.dumps(state, indent=2) + "\n", encoding="utf-8")
            if describe is not None:
                describe(part)
        for path in older:
            shutil.rmtree(path)
        return target

    @classmethod
    def read(cls, path: Path) -> "Checkpoint":
        """ValueError for a folder that isn't a whole checkpoint of this format."""
        try:
            state = json.loads((path / STATE_FILE).read_text(encoding="utf-8"))
            if state.pop("format") != FORMAT:
                raise ValueError(f"another format than {FORMAT}")
            average = path / AVERAGE_FILE
            return cls(
                state.pop("step"),
                safetensors.torch.load_file(path / WEIGHTS_FILE),
                safetensors.torch.load_file(path / OPTIMIZER_FILE),
                safetensors.torch.load_file(average) if average.exists() else None,
                state,
            )
        except (OSError, ValueError, KeyError, safetensors.SafetensorError) as error:
            raise ValueError(f"{path} is not a whole checkpoint: {error}") from error


def found_in(folder: Path) -> list[Path]:
    """The checkpoints of a run, oldest first."""
    return sorted(path for path in folder.glob("step-*") if path.is_dir())


def _contiguous(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
