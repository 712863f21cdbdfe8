"""Engines that run a finished student: torch, and ONNX Runtime in fp32 or int8. A predictor cannot tell which."""
