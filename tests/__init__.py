"""The tests: unit/ mirrors the packages, contract/ the queue on real servers, e2e/ whole fleets of real processes."""
