"""The ground of everything that runs on several processes: collectives, and the placements of DTensors."""
