"""Large sparse targets (Vincent et al., 2015): exact steps at a cost without V."""
