"""The names of the standard library that `class Solution` problems take for granted.

Sites that pose such problems import them before a solution, and so does LiveCodeBench, so that models leave the imports
out. `builtins` comes last: other modules have a `pow`, an `open` and a `compile` of their own.
"""

PREAMBLE = """
import bisect, collections, copy, datetime, functools, heapq, io, itertools, json, math, operator, random, re
import statistics, string, sys, typing
from string import *
from re import *
from datetime import *
from collections import *
from heapq import *
from bisect import *
from copy import *
from math import *
from random import *
from statistics import *
from itertools import *
from functools import *
from operator import *
from io import *
from json import *
from typing import *
from builtins import *
sys.setrecursionlimit(50_000)
"""
