"""From a torch model to a multi-adapter graph: trace, match modules to nodes, insert the operator and its body."""
