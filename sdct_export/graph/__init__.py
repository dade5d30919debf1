"""Graph surgery on an exported ONNX model: `match` (module -> node), `insert` (the pass), `function_body` (standard operators)."""
