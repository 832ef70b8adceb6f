"""How well relevance tells what a prediction rests on: perturbation curves and localization."""
