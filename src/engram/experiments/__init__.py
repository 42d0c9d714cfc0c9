"""Floor 6: experiments. Budgets divided between experts and memory, backbones of transformers, and sweeps of many small trainings."""

from typing import TYPE_CHECKING

from engram.lazy import loaded_on_use

if TYPE_CHECKING:
    from engram.evaluation.versions import versions
    from engram.experiments.backbone import BackboneConfig, build_backbone
    from engram.experiments.budget import TOLERANCE, Allocation, allocate
    from engram.experiments.counts import Counts, count_model, predict_counts, predict_flops
    from engram.experiments.data import prepare_data
    from engram.experiments.point import run_point
    from engram.experiments.recipe import BudgetRecipe, DataRecipe, PointRecipe, read_point
    from engram.experiments.summary import summarise
    from engram.experiments.sweep import run_sweep
    from engram.experiments.sweep_recipe import SweepRecipe, read_base, read_sweep

_HOMES = {
    "Allocation": "engram.experiments.budget",
    "BackboneConfig": "engram.experiments.backbone",
    "BudgetRecipe": "engram.experiments.recipe",
    "Counts": "engram.experiments.counts",
    "DataRecipe": "engram.experiments.recipe",
    "PointRecipe": "engram.experiments.recipe",
    "SweepRecipe": "engram.experiments.sweep_recipe",
    "TOLERANCE": "engram.experiments.budget",
    "allocate": "engram.experiments.budget",
    "build_backbone": "engram.experiments.backbone",
    "count_model": "engram.experiments.counts",
    "predict_counts": "engram.experiments.counts",
    "predict_flops": "engram.experiments.counts",
    "prepare_data": "engram.experiments.data",
    "read_base": "engram.experiments.sweep_recipe",
    "read_point": "engram.experiments.recipe",
    "read_sweep": "engram.experiments.sweep_recipe",
    "run_point": "engram.experiments.point",
    "run_sweep": "engram.experiments.sweep",
    "summarise": "engram.experiments.summary",
    "versions": "engram.evaluation.versions",
}

__all__ = sorted(_HOMES)

__getattr__ = loaded_on_use(__name__, _HOMES)


def __dir__() -> list[str]:
    return __all__
