"""All measurements, by name; those of `hiermoe run` are chosen by conf/measure/."""

from collections.abc import Mapping

from hiermoe.measure.bound import bound_times
from hiermoe.measure.calibrate import Calibrate
from hiermoe.measure.measurement import Measurement
from hiermoe.measure.plan_cost import planning_cost
from hiermoe.measure.predict import simulate
from hiermoe.measure.replay import Replay
from hiermoe.measure.self_test import SelfTest
from hiermoe.measure.train import Train
from hiermoe.measure.workload import OfWorkloads
from hiermoe.ranks.server import preload

MEASUREMENTS: Mapping[str, Measurement] = {
    "predict": OfWorkloads(simulate, "simulated"),
    "bound": OfWorkloads(bound_times, "simulated"),
    "plan_cost": OfWorkloads(planning_cost, "local"),
    "self_test": SelfTest(),
    "replay": Replay(),
    "calibrate": Calibrate(),
    "train": Train(),
}

preload("hiermoe.narrow.preload")  # torch and megatron, for all ranks that measure
