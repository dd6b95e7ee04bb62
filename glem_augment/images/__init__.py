"""Images: sources, decoding, matching of classes, and the pixel levels of a flow."""
