"""The demo: one request trace, served at full budget and again under the controller."""
