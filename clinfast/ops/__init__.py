"""The ops: schema, fp32 reference, fake and tolerances of each, and the registry that chooses a backend."""
