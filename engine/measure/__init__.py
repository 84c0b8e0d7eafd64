"""Measuring a model on a device: latency, energy, what the device can do at best."""
