"""Post-training quantisation: observers, schemes, SmoothQuant, AWQ, error-compensated rounding and what keeps confidence."""
