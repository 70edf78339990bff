"""The policy-optimization core: tensors in, `(loss, metrics)` out; torch and the standard library only."""
