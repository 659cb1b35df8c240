"""All measurements, by name; those of `hiermoe run` are chosen by conf/measure/."""

from collections.abc import Mapping

from hiermoe.measure.bound import Bound
from hiermoe.measure.calibrate import Calibrate
from hiermoe.measure.measurement import Measurement
from hiermoe.measure.plan_cost import PlanCost
from hiermoe.measure.predict import Predict
from hiermoe.measure.replay import Replay
from hiermoe.measure.self_test import SelfTest
from hiermoe.measure.train import Train
from hiermoe.ranks.launch import preload

MEASUREMENTS: Mapping[str, Measurement] = {
    "predict": Predict(),
    "bound": Bound(),
    "plan_cost": PlanCost(),
    "self_test": SelfTest(),
    "replay": Replay(),
    "calibrate": Calibrate(),
    "train": Train(),
}

preload("hiermoe.narrow.preload")  # torch and megatron, for all ranks that measure
