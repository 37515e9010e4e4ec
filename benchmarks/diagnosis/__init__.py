"""Labelled fault suite: how often are the alerts right, on runs whose label is found by counterfactual or injection?"""
