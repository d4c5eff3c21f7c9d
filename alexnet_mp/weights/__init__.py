"""Files with weights, our own and foreign ones. Imports config and model."""
