"""The base and the adapters on it: opening, encoding, packing, sampling."""
