"""Floor 6: experiments. Budgets divided between experts and memory, backbones of transformers, and sweeps of many small trainings."""

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

__all__ = [
    "TOLERANCE",
    "Allocation",
    "BackboneConfig",
    "BudgetRecipe",
    "Counts",
    "DataRecipe",
    "PointRecipe",
    "SweepRecipe",
    "allocate",
    "build_backbone",
    "count_model",
    "predict_counts",
    "predict_flops",
    "prepare_data",
    "read_base",
    "read_point",
    "read_sweep",
    "run_point",
    "run_sweep",
    "summarise",
    "versions",
]
