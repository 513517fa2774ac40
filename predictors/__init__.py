"""What will be needed: predictors of the experts that come next. Imports `cache`, never `offload`."""
