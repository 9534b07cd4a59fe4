"""Likelihoods: what is assumed about the data, given a model's outputs.

The Fisher information is defined by a likelihood, not by a loss: by the negative log-likelihood
(NLL) of *one* sample, unreduced and unscaled. A likelihood defines it and, for expectations over
the model's own predictions, a draw of targets (`"mc"`) or all exact terms (`"exact"`).
The built-in ones work on whole batches, and on batches of one sample inside `torch.func.vmap`.

Sources: Kunstner, Hennig, Balles, *Limitations of the empirical Fisher approximation* (2019), for
what the three types are; Martens, *New insights and perspectives on the natural gradient method*
(2020), for the likelihoods and their exact expectations.
"""

from ewc.likelihoods.bernoulli import Bernoulli
from ewc.likelihoods.classification import Classification
from ewc.likelihoods.custom import Custom
from ewc.likelihoods.faults import Fault
from ewc.likelihoods.likelihood import Likelihood
from ewc.likelihoods.pointwise import Pointwise, Targets
from ewc.likelihoods.regression import Regression
from ewc.likelihoods.time_series import TimeSeries

__all__ = [
    "Bernoulli",
    "Classification",
    "Custom",
    "Fault",
    "Likelihood",
    "Pointwise",
    "Regression",
    "Targets",
    "TimeSeries",
]
