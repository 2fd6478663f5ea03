"""The demo: one request trace, served under the controller and at full budget around that."""
