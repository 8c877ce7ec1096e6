"""Which path of a drafted tree the target accepts."""
