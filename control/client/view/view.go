// Package view makes what people and programs read of the daemon's answers: tables, one page of status, JSON. It selects, sums and lays out;
// it calls nobody.
//
//	LocalService's answers ─> Select, Lookup, Sum, Since ─> Status, Routes, Pods, Drops, Counters ─> a terminal
//	                       └───────────────────────────────> JSON ─> a program
//
// Tables are for people: their columns may change, their numbers are exact. Programs read the JSON: proto3's mapping with the names of the
// .proto file, every field present, in the order of the messages; 64-bit numbers are strings, as that mapping has it.
package view

import (
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"strconv"
	"strings"
	"time"
	"unicode/utf8"

	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/proto"
)

// JSON writes a message as JSON, indented.
func JSON(w io.Writer, m proto.Message) error {
	return writeJSON(w, m, func(out *bytes.Buffer, text []byte) error { return json.Indent(out, text, "", "  ") })
}

// JSONLine writes a message as JSON on one line, for streams.
func JSONLine(w io.Writer, m proto.Message) error { return writeJSON(w, m, json.Compact) }

func writeJSON(w io.Writer, m proto.Message, format func(*bytes.Buffer, []byte) error) error {
	text, err := protojson.MarshalOptions{UseProtoNames: true, EmitUnpopulated: true}.Marshal(m)
	if err != nil {
		return err
	}
	// protojson varies its white space from build to build, so that nobody compares it; here people do.
	var out bytes.Buffer
	if err := format(&out, text); err != nil {
		return err
	}
	out.WriteByte('\n')
	_, err = w.Write(out.Bytes())
	return err
}

// table is rows of cells, laid out in columns as wide as their widest cell.
type table struct {
	right []bool // columns of numbers, aligned to the right
	rows  [][]string
}

// newTable makes a table with a heading. A column whose heading starts with '>' is aligned to the right.
func newTable(headings ...string) *table {
	t := &table{right: make([]bool, len(headings))}
	for i := range headings {
		headings[i], t.right[i] = strings.CutPrefix(headings[i], ">")
	}
	t.rows = append(t.rows, headings)
	return t
}

// row appends a row. Empty cells become "-", so that every row has as many words.
func (t *table) row(cells ...string) {
	for i := range cells {
		if cells[i] == "" {
			cells[i] = "-"
		}
	}
	t.rows = append(t.rows, cells)
}

// write lays the table out, without white space at the ends of lines.
func (t *table) write(w io.Writer) error {
	width := make([]int, len(t.rows[0]))
	for _, r := range t.rows {
		for i, c := range r {
			width[i] = max(width[i], utf8.RuneCountInString(c))
		}
	}
	var out, line strings.Builder
	for _, r := range t.rows {
		line.Reset()
		for i, c := range r {
			if i > 0 {
				line.WriteString("  ")
			}
			pad := strings.Repeat(" ", width[i]-utf8.RuneCountInString(c))
			if t.right[i] {
				line.WriteString(pad + c)
			} else {
				line.WriteString(c + pad)
			}
		}
		out.WriteString(strings.TrimRight(line.String(), " "))
		out.WriteByte('\n')
	}
	_, err := io.WriteString(w, out.String())
	return err
}

func number[N uint32 | uint64](n N) string { return strconv.FormatUint(uint64(n), 10) }

// age is how long ago something was, in the two largest units that matter.
func age(now, then time.Time) string {
	d := max(now.Sub(then), 0)
	const day = 24 * time.Hour
	switch {
	case d >= day:
		return fmt.Sprintf("%dd%dh", d/day, d%day/time.Hour)
	case d >= time.Hour:
		return fmt.Sprintf("%dh%dm", d/time.Hour, d%time.Hour/time.Minute)
	}
	return d.Round(time.Second).String()
}
