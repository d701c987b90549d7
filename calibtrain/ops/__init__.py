"""Fused ops: one public function each."""
