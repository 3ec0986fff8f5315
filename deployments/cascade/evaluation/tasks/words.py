"""The words the families share, with their forms."""

from __future__ import annotations

NAMES = (
    "Anna", "Ben", "Clara", "David", "Emma", "Felix", "Greta", "Hugo", "Ida", "Jonas",
    "Karla", "Leo", "Maria", "Nina", "Oscar", "Paul", "Rosa", "Simon", "Tara", "Victor",
)  # fmt: skip

CITIES = (
    "Berlin", "Lyon", "Oslo", "Rome", "Madrid", "Vienna", "Paris", "Porto", "Dublin", "Prague",
    "Athens", "Geneva", "Cairo", "Lima", "Boston", "Kyoto",
)  # fmt: skip

JOBS = (
    "baker", "painter", "teacher", "doctor", "farmer", "lawyer", "pilot", "singer", "nurse",
    "writer", "chemist", "tailor",
)  # fmt: skip

THINGS = (
    "apples", "books", "pens", "coins", "cards", "stamps", "eggs", "plums", "shells", "stones",
)  # fmt: skip

DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")

SMALL_NUMBERS = (
    "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten",
    "eleven", "twelve",
)  # fmt: skip
