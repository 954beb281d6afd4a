"""The machine: device, processes, signals, files, terminal."""
