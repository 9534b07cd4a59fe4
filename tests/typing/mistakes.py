"""Mistakes that a type checker must find: each line that ends in `# error` has one, and no other.

This file is not run.
"""

from torch import Tensor, nn

from ewc import (
    EWC,
    Bernoulli,
    Classification,
    Custom,
    Likelihood,
    Method,
    OnlineEWC,
    Pointwise,
    Regression,
    Summary,
    TimeSeries,
)

model = nn.Linear(4, 5)


def poisson_nll(outputs: Tensor, counts: Tensor) -> Tensor:
    return (outputs.exp() - counts * outputs).sum(1)


EWC(model, Classification(), fisher_type="emprical")  # error
EWC(model, Classification(), reduction="average")  # error
EWC(model, Classification(), 300.0)  # error
EWC(model, nn.CrossEntropyLoss())  # error
EWC(model, Classification(), strength="automatic")  # error
EWC(model, Classification()).strength = "automatic"  # error
EWC(model, Classification(), process_group="world")  # error
EWC(model, Classification(), forward="forward")  # error
OnlineEWC(model, Classification(), fisher_type="fisher")  # error
OnlineEWC(model, Classification(), decay="0.9")  # error

Classification([0, 1], abs)  # error
Bernoulli([0, 1], abs)  # error
Regression(1.0, [0, 1])  # error
TimeSeries(Classification(), True)  # error
TimeSeries(Custom(poisson_nll))  # error
Custom(poisson_nll, poisson_nll)  # error
Classification().supports("emprical")  # error
Likelihood()  # error
Pointwise()  # error

summary: Summary = EWC(model, Classification()).consolidate([])
print(summary.task)  # error
summary.n_tasks = 3  # error
method: Method = "rules"  # error
print(summary.parameters["weight"].sum)  # error


class Unfinished(Likelihood):
    def sample(self, outputs: Tensor) -> Tensor:
        return outputs


class Reduced(Likelihood):
    def nll(self, outputs: Tensor, targets: Tensor) -> float:  # error
        return float((outputs - targets).square().sum())


class Typo(Pointwise, takes_batch=True):  # error
    def position_nll(self, head: Tensor, targets: Tensor) -> Tensor:
        return head - targets


Unfinished()  # error
