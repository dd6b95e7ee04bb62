"""GLEMAugment: moves of real images along the modes of their classes, in any training loop."""
