"""What runs inside a training pod. `__main__` is the process, `wire` its door to the control plane; the rest knows neither."""
