"""Small repositories in eight languages for the tests of `data prepare code`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from data.prepare.code import make_kind
from data.prepare.common import Record

OPTIONS: dict[str, Any] = {
    "form": "completion",
    "level": None,
    "languages": None,
    "no_tests": False,
    "max_chars": 6000,
    "min_chars": 20,
    "infill_markers": ("<PREFIX>", "<SUFFIX>", "<MIDDLE>"),
}

RUST = """\
// Copyright 2020 Ada Example
// SPDX-License-Identifier: MIT

//! Points, and what one does with them.

use std::fmt;

/// A point in the plane.
///
/// It is small.
#[derive(Debug, Clone)]
pub struct Point<T> {
    /// To the right.
    x: T,
}

/// What every point can do.
#[allow(dead_code)]
// unsure about the bounds
impl<T: Copy> Point<T> {
    /// The distance to the right,
    /// as a copy of it.
    #[must_use]
    pub fn right(&self) -> T {
        self.x
    }
}

impl fmt::Display for Point<i32> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "({})", self.x)
    }
}

/// Sums things up.
macro_rules! sum {
    ($a:expr, $b:expr) => { $a + $b };
}

struct Unit;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn is_right() {
        assert_eq!(Point { x: 1 }.right(), 1);
    }
}
"""

PYTHON = '''\
#!/usr/bin/env python3
# Copyright (c) 2021 Ada Example. All rights reserved.

"""Boxes."""

import functools


class Box(object):
    """A box that holds
    one thing.
    """

    def __init__(self, thing):
        self.thing = thing

    # computed once
    @functools.cached_property
    @staticmethod
    def doubled(self) -> int:
        """Twice the thing that is in it.

        More:
            indented
        """
        twice = self.thing * 2

        return twice


async def fetch(
    url,
):
    return await get(url) or default


def nothing_at_all_here():
    """Does nothing whatever."""
'''

TYPESCRIPT = """\
/** A store of values by name. */
@sealed({ deep: true })
export class Store<T> extends Base {
  /**
   * Finds a value by its name.
   * @param name its name
   */
  @logged()
  find(name: string): T | undefined {
    return this.values.get(name);
  }
}

/** Adds two numbers together. */
export const add = async (a: number, b: number): Promise<number> => {
  return a + b;
};

/** Options of the store. */
export interface Options {
  size: number;
}

namespace Inner {
  export function hidden(): string {
    return "found anyway";
  }
}
"""

JAVASCRIPT = """\
'use strict';

/** Doubles the given number. */
exports.double = function (x) {
  return 2 * x;
};

class Queue {
  /** Takes the next job off. */
  static async next() {
    return await this.jobs.shift();
  }
}
"""

GO = """\
package stack

// Stack is a stack of values.
type Stack[T any] struct {
	values []T
}

// Push puts a value on top.
// It never fails.
func (s *Stack[T]) Push(value T) {
	s.values = append(s.values, value)
}

func max(a, b int) int { return a + b - min(a, b) }
"""

JAVA = """\
package shapes;

/** A small point in the plane. */
@Immutable
public final class Point {
  /**
   * Gives the number back, doubled.
   *
   * @return twice of it
   */
  @Override
  @Deprecated
  public int twice() {
    return 2 * x;
  }

  enum Side {
    LEFT, RIGHT;

    int number() {
      return ordinal() + 1;
    }
  }
}
"""

C = """\
#ifndef LIST_H
#define LIST_H

/* A list of whole numbers. */
struct list {
    int head;
};

/* How large a thing is. */
typedef struct { int width; int height; } size_type;

/*
 * Adds a number at the front.
 */
static struct list *
push(struct list *list, int number)
{
    list->head = number;
    return list;
}

int declared_only(int a, int b, int c);

#endif
"""

CPP = """\
namespace shapes {

/// A circle with a radius.
template <typename T>
class Circle : public Shape {
 public:
  explicit Circle(T radius) : radius_(radius) {}

  /// The area of it all.
  T area() const override {
    return 3 * radius_ * radius_;
  }
};

// Counts the shapes in a list.
int Count::all(const List& shapes) {
  return shapes.size();
}

}  // namespace shapes
"""

FILES = {
    "lib.rs": RUST,
    "box.py": PYTHON,
    "store.ts": TYPESCRIPT,
    "queue.js": JAVASCRIPT,
    "stack.go": GO,
    "Point.java": JAVA,
    "list.h": C,
    "shapes.cpp": CPP,
}


def write(folder: Path, files: dict[str, str | bytes] | dict[str, str]) -> Path:
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return folder


def prepare(source: Path, **options: Any) -> tuple[list[dict[str, Any]], Record]:
    """Rows with their source, and what was told."""
    record = Record()
    kind = make_kind({**OPTIONS, **options})
    return [{**sample.values, "source": sample.source} for sample in kind.samples(source, record)], record


def left_out(record: Record) -> dict[str, list[str]]:
    return {reason: entry["named"] for reason, entry in record.left_out.to_json().items()}
