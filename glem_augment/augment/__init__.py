"""GLEMAugment: moves of real images along the modes of their classes, and the ways into a training loop."""
