"""The controller: one leader among any number of standbys keeps the declared models running."""
