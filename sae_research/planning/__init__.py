"""What a run will take before it starts: work by stage, seconds on a device, memory and disk. No weights are loaded."""
