"""The choice between implementations by a short measurement: each is checked, all are timed, the fastest is taken."""
