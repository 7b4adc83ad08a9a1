"""What tests stand on: real servers, real role processes, faults on the wire, waiting with a limit."""
