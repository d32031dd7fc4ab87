#include "parts.h"

static unsigned place(unsigned all, unsigned columns, unsigned left, unsigned right)
{
	unsigned count = 0;

	if (columns == all)
		return 1;
	for (unsigned free = all & ~(columns | left | right); free; free &= free - 1) {
		unsigned here = free & -free;
		count += place(all, columns | here, (left | here) << 1, (right | here) >> 1);
	}
	return count;
}

unsigned count_queens(unsigned size)
{
	return place((1u << size) - 1, 0, 0, 0);
}
