"""How a paper puts what an option of a recipe does: one phrase for each of its choices."""

from __future__ import annotations

from typing import Final

RESIZED: Final = {
    "crop": "resized to {0} pixels along its shorter side and cropped to the central {1} × {1}",
    "squash": "resized to {1} × {1} pixels without keeping its aspect ratio",
    "pad": "resized to {1} pixels along its longer side and padded with black to {1} × {1}",
}
"""By ``resize`` of the preprocessing; 0 is the size it is resized to, 1 that of the input."""
FEATURES: Final = {
    "projected": "embedding",
    "pooled": "pooled output, before the projection,",
    "both": "embedding and pooled output",
}
INPUTS: Final = {
    "l2": "scaled to unit length",
    "standard": "standardised by the mean and standard deviation of the training data",
    "none": "not normalised",
}
LOSSES: Final = {
    "focal": "focal loss [Lin 2017] with γ = {gamma:g}, whose terms were all multiplied by "
    "α = {alpha:g}",
    "focal-balanced": "α-balanced focal loss [Lin 2017] with α = {alpha:g} and γ = {gamma:g}",
    "class-balanced": "class-balanced focal loss [Cui 2019] with β = 0.9999 and γ = {gamma:g}",
    "bce": "binary cross-entropy",
    "weighted-bce": "binary cross-entropy, in which the positives of each finding weighed as much "
    "as its negatives",
    "asymmetric": "asymmetric loss [Ridnik 2021] with γ = {gamma:g} for negatives, 0 for "
    "positives and a margin of 0.05",
}
"""In square brackets is what a phrase cites, by the keys of :data:`REFERENCES`."""
SCHEDULES: Final = {
    "plateau": "was halved when the loss of the held-out fold had not improved for more than "
    "{patience} epochs",
    "constant": "was constant",
    "cosine": "followed a cosine",
    "one-cycle": "followed one cycle of rise and fall",
}
FINALS: Final = {
    "ensemble": "The final model averages the probabilities of the {n_folds} models of the folds",
    "refit": "The final model was trained again on all training data for that number of epochs",
    "best-fold": "The final model is that of the fold with the best score",
}
CALIBRATIONS: Final = {
    "none": "Probabilities were not calibrated, and are scores",
    "temperature": "Probabilities were calibrated by a single temperature [Guo 2017]",
    "platt": "Probabilities were calibrated by a slope and an intercept for each finding "
    "[Platt 1999]",
    "platt-shrunk": "Probabilities were calibrated by a slope and an intercept for each finding "
    "[Platt 1999], drawn by empirical Bayes towards those that all findings share",
}
RULES: Final = {
    "f1": "maximises F1",
    "youden": "maximises Youden's index [Youden 1950]",
    "sensitivity": "is the highest with a sensitivity of at least {target:g}",
    "specificity": "is the lowest with a specificity of at least {target:g}",
    "ppv": "is the lowest with a positive predictive value of at least {target:g}",
}
REFERENCES: Final = {
    "Lin 2017": "T.-Y. Lin et al., Focal loss for dense object detection, ICCV 2017.",
    "Cui 2019": "Y. Cui et al., Class-balanced loss based on effective number of samples, CVPR "
    "2019.",
    "Ridnik 2021": "T. Ridnik et al., Asymmetric loss for multi-label classification, ICCV 2021.",
    "Loshchilov 2019": "I. Loshchilov and F. Hutter, Decoupled weight decay regularization, ICLR "
    "2019.",
    "Guo 2017": "C. Guo et al., On calibration of modern neural networks, ICML 2017.",
    "Platt 1999": "J. Platt, Probabilistic outputs for support vector machines and comparisons to "
    "regularized likelihood methods, in Advances in Large Margin Classifiers, 1999.",
    "Youden 1950": "W. J. Youden, Index for rating diagnostic tests, Cancer 3, 1950.",
    "Rubin 1981": "D. B. Rubin, The Bayesian bootstrap, The Annals of Statistics 9, 1981.",
    "Zhang 2018": "H. Zhang et al., mixup: Beyond empirical risk minimization, ICLR 2018.",
    "Varma 2006": "S. Varma and R. Simon, Bias in error estimation when using cross-validation for "
    "model selection, BMC Bioinformatics 7, 2006.",
    "Bengio 2004": "Y. Bengio and Y. Grandvalet, No unbiased estimator of the variance of K-fold "
    "cross-validation, Journal of Machine Learning Research 5, 2004.",
    "Liu 2023": "Y. Liu et al., PatchDropout: Economizing vision transformers using patch "
    "dropout, WACV 2023.",
}
