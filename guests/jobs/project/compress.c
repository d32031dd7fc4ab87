#include "parts.h"
#include <string.h>

/* Runs of bytes that were there before become a distance and a length, behind a zero; a zero
 * itself is a distance of zero. */
enum { LEAST = 4, MOST = 255, SLOTS = 1 << 12 };

static unsigned slot(const unsigned char *at)
{
	uint32_t word;
	memcpy(&word, at, sizeof word);
	return word * 2654435761u >> 20;
}

size_t compress(const unsigned char *from, size_t size, unsigned char *to)
{
	static size_t seen[SLOTS];
	unsigned char *out = to;
	size_t at = 0;

	memset(seen, 0xff, sizeof seen);
	while (at < size) {
		size_t length = 0, before = 0;
		if (at + LEAST <= size) {
			unsigned place = slot(from + at);
			before = seen[place];
			seen[place] = at;
			if (before < at && at - before < 65536)
				while (length < MOST && at + length < size &&
				       from[before + length] == from[at + length])
					length++;
		}
		if (length >= LEAST) {
			size_t distance = at - before;
			*out++ = 0;
			*out++ = (unsigned char)(distance >> 8);
			*out++ = (unsigned char)distance;
			*out++ = (unsigned char)length;
			at += length;
		} else if (from[at]) {
			*out++ = from[at++];
		} else {
			memset(out, 0, 4);
			out += 4;
			at++;
		}
	}
	return (size_t)(out - to);
}

size_t expand(const unsigned char *from, size_t size, unsigned char *to)
{
	const unsigned char *end = from + size;
	unsigned char *out = to;

	while (from < end) {
		if (*from) {
			*out++ = *from++;
			continue;
		}
		size_t distance = (size_t)from[1] << 8 | from[2], length = from[3];
		from += 4;
		if (!distance)
			*out++ = 0;
		for (; length; length--, out++)
			*out = out[-(ptrdiff_t)distance];
	}
	return (size_t)(out - to);
}
