"""Analyses look at a finished evaluation: functions of an AnalysisContext that draw figures and log Results."""

from aerl.analyses.context import AnalysisContext, Beside, NotMade, Subject, class_name

__all__ = ["AnalysisContext", "Beside", "NotMade", "Subject", "class_name"]
