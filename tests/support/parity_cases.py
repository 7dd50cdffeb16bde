"""Changes of configurations and tensors that parity must locate."""

import dataclasses

import numpy as np


def chain(stages, x):
    """The inputs of all stages and the last output."""
    states = [x]
    for stage in stages:
        states.append(stage(states[-1]))
    return np.concatenate(states)


def names(report):
    return [stage.name for stage in report.stages]


def add(amount, *index):
    def change(values):
        values[index] += amount

    return change


def vision(config, **changes):
    return dataclasses.replace(config, vision=dataclasses.replace(config.vision, **changes))


def text(config, **changes):
    return dataclasses.replace(config, text=dataclasses.replace(config.text, **changes))
