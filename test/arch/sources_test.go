package arch

import (
	"fmt"
	"go/ast"
	"go/parser"
	"go/token"
	"slices"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
)

func unsafeBreaches(all []*source) (breaches []string) {
	for _, s := range all {
		if s.generated || strings.HasSuffix(strings.TrimSuffix(s.name, "_test.go"), "_unsafe") || strings.HasSuffix(s.name, "_unsafe.go") {
			continue
		}
		for _, imp := range s.syntax.Imports {
			if imp.Path.Value == `"unsafe"` {
				breaches = append(breaches, s.name+" imports unsafe")
			}
		}
	}
	return breaches
}

func TestUnsafeStandsInItsFiles(t *testing.T) {
	check(t, "whoever reviews memory safety reads the *_unsafe.go files and nothing else. Move the use there, with the invariant it rests on "+
		"written above it; for the size of a type in a test reflect will do.", unsafeBreaches(sources(t)))
}

const (
	longLines    = 400 // asking to be two files
	tooLongLines = 500
)

func lengthBreaches(all []*source, limit int) (breaches []string) {
	for _, s := range all {
		if !s.generated && s.lines > limit {
			breaches = append(breaches, fmt.Sprintf("%s has %d lines", s.name, s.lines))
		}
	}
	return breaches
}

func TestFilesAreShort(t *testing.T) {
	all := sources(t)
	for _, b := range lengthBreaches(all, longLines) {
		t.Logf("%s: asking to be two (over %d)", b, longLines)
	}
	check(t, fmt.Sprintf("a file over %d lines has more than one subject, and a reader has to find out which. Split it by subject.", tooLongLines),
		lengthBreaches(all, tooLongLines))
}

func packageCommentBreaches(all []*source) (breaches []string) {
	documented := map[string]bool{}
	var order []string
	for _, s := range all {
		if s.generated {
			continue // a package of generated files only is explained by what it is generated from
		}
		path := s.pkg.path()
		if _, seen := documented[path]; !seen {
			documented[path] = false
			order = append(order, path)
		}
		// A package of tests only is explained in one of them.
		if s.syntax.Doc != nil && (!s.test || len(s.pkg.GoFiles)+len(s.pkg.CgoFiles) == 0) {
			// A "go:build" line or a licence alone is no explanation.
			documented[path] = documented[path] || strings.TrimSpace(s.syntax.Doc.Text()) != ""
		}
	}
	for _, path := range order {
		if !documented[path] {
			breaches = append(breaches, path+" has no package comment")
		}
	}
	return breaches
}

func TestPackagesHaveComments(t *testing.T) {
	check(t, "a package comment says what the package is for and how data moves through it; a newcomer starts there.", packageCommentBreaches(sources(t)))
}

// standardMethods have the contract that the standard library gives them.
var standardMethods = []string{"Error", "Unwrap", "String"}

// undocumented returns the exported names of a file that no comment explains. The comment of a group explains its members, as does one
// at the end of a member's line.
func undocumented(f *ast.File) (names []string) {
	for _, decl := range f.Decls {
		switch d := decl.(type) {
		case *ast.FuncDecl:
			if !d.Name.IsExported() || d.Doc.Text() != "" {
				continue
			}
			if d.Recv != nil {
				recv := receiver(d.Recv.List[0].Type)
				if !ast.IsExported(recv) || slices.Contains(standardMethods, d.Name.Name) {
					continue
				}
				names = append(names, recv+"."+d.Name.Name)
				continue
			}
			names = append(names, d.Name.Name)
		case *ast.GenDecl:
			for _, spec := range d.Specs {
				switch s := spec.(type) {
				case *ast.TypeSpec:
					if s.Name.IsExported() && d.Doc.Text() == "" && s.Doc.Text() == "" {
						names = append(names, s.Name.Name)
					}
				case *ast.ValueSpec:
					for _, n := range s.Names {
						if n.IsExported() && d.Doc.Text() == "" && s.Doc.Text() == "" && s.Comment.Text() == "" {
							names = append(names, n.Name)
						}
					}
				}
			}
		}
	}
	return names
}

// receiver is the name of a method's type, without pointer and type parameters.
func receiver(e ast.Expr) string {
	switch e := e.(type) {
	case *ast.StarExpr:
		return receiver(e.X)
	case *ast.IndexExpr:
		return receiver(e.X)
	case *ast.IndexListExpr:
		return receiver(e.X)
	case *ast.Ident:
		return e.Name
	}
	return ""
}

func docBreaches(all []*source) (breaches []string) {
	for _, s := range all {
		if s.test || s.generated || s.pkg.Name == "main" {
			continue
		}
		for _, n := range undocumented(s.syntax) {
			breaches = append(breaches, fmt.Sprintf("%s: %s has no comment", s.name, n))
		}
	}
	return breaches
}

func TestExportedNamesHaveComments(t *testing.T) {
	check(t, "the comment of an exported name is its contract: units, ownership, who may call it concurrently, errors. Write it, or do not export the name.",
		docBreaches(sources(t)))
}

// TestSourceRulesFindBreaches gives each rule files that break it, and files that just do not.
func TestSourceRulesFindBreaches(t *testing.T) {
	mk := func(name, text string) []*source {
		fset := token.NewFileSet()
		f, err := parser.ParseFile(fset, name, text, parser.ParseComments)
		require.NoError(t, err)
		return []*source{{
			pkg: &pkg{ImportPath: module + "dataplane/x", Name: f.Name.Name, GoFiles: []string{"x.go"}}, name: "dataplane/x/" + name,
			test: strings.HasSuffix(name, "_test.go"), generated: ast.IsGenerated(f), lines: fset.File(f.FileStart).LineCount(), syntax: f,
		}}
	}
	over := func(all []*source) []string { return lengthBreaches(all, tooLongLines) }
	const gen = "// Code generated by x. DO NOT EDIT.\n\n"
	for _, tc := range []struct {
		name string
		rule func([]*source) []string
		srcs []*source
		want []string
	}{
		{"unsafe", unsafeBreaches, mk("x.go", "package x\nimport \"unsafe\""), []string{"dataplane/x/x.go imports unsafe"}},
		{"unsafe in a test", unsafeBreaches, mk("x_test.go", "package x\nimport _ \"unsafe\""), []string{"dataplane/x/x_test.go imports unsafe"}},
		{"unsafe in its file", unsafeBreaches, mk("x_unsafe.go", "package x\nimport \"unsafe\""), nil},
		{"unsafe in its test file", unsafeBreaches, mk("x_unsafe_test.go", "package x\nimport \"unsafe\""), nil},
		{"unsafe generated", unsafeBreaches, mk("x.pb.go", gen+"package x\nimport \"unsafe\""), nil},

		{"long", over, mk("x.go", "package x"+strings.Repeat("\n", tooLongLines+1)), []string{"dataplane/x/x.go has 501 lines"}},
		{"just not long", over, mk("x.go", "package x"+strings.Repeat("\n", tooLongLines)), nil},
		{"long but generated", over, mk("x.go", gen+"package x"+strings.Repeat("\n", 2*tooLongLines)), nil},

		{"no package comment", packageCommentBreaches, mk("x.go", "// Licence.\n\npackage x"), []string{"dataplane/x has no package comment"}},
		{"only a test's", packageCommentBreaches, mk("x_test.go", "// Package x is.\npackage x"), []string{"dataplane/x has no package comment"}},
		{"generated only", packageCommentBreaches, mk("x.pb.go", gen+"package x"), nil},
		{"package comment", packageCommentBreaches, mk("x.go", "// Package x is.\npackage x"), nil},

		{"func", docBreaches, mk("x.go", "package x\nfunc F() {}"), []string{"dataplane/x/x.go: F has no comment"}},
		{"method", docBreaches, mk("x.go", "package x\n// T is.\ntype T[P any] int\nfunc (t *T[P]) M() {}"), []string{"dataplane/x/x.go: T.M has no comment"}},
		{"error", docBreaches, mk("x.go", "package x\n// T is.\ntype T int\nfunc (T) Error() string { return `` }"), nil},
		{"method of a private type", docBreaches, mk("x.go", "package x\ntype t int\nfunc (t) M() {}"), nil},
		{"type", docBreaches, mk("x.go", "package x\ntype T int"), []string{"dataplane/x/x.go: T has no comment"}},
		{"const", docBreaches, mk("x.go", "package x\nconst (\n\tA = 1 // is.\n\tB = 2\n)"), []string{"dataplane/x/x.go: B has no comment"}},
		{"directive", docBreaches, mk("x.go", "package x\n//go:noinline\nfunc F() {}"), []string{"dataplane/x/x.go: F has no comment"}},
		{"group", docBreaches, mk("x.go", "package x\n// All are.\nconst (\n\tA = 1\n\tB = 2\n)"), nil},
		{"test file", docBreaches, mk("x_test.go", "package x\nfunc F() {}"), nil},
		{"program", docBreaches, mk("x.go", "package main\nfunc F() {}"), nil},
	} {
		t.Run(tc.name, func(t *testing.T) { require.Equal(t, tc.want, tc.rule(tc.srcs)) })
	}
}
