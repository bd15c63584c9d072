"""The data path: routing, canary weights, Predict and the prediction log."""
