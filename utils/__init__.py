"""What knows neither MRI nor scores: command line, files, device, storage, random numbers. Imports no other room."""
