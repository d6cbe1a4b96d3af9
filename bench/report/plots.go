package report

import (
	"fmt"
	"image/color"
	"path/filepath"
	"regexp"
	"slices"
	"strings"

	"gonum.org/v1/plot"
	"gonum.org/v1/plot/plotter"
	"gonum.org/v1/plot/plotutil"
	"gonum.org/v1/plot/vg"
	"gonum.org/v1/plot/vg/draw"

	"github.com/overplane/overplane/bench/result"
)

// plotted are the metrics that get a bar chart.
var plotted = map[string]string{
	"tcp|throughput": "TCP throughput, Gbit/s", "tcp|p99": "TCP request/response, p99, µs", "pps|flooded": "Packets that arrive of a flood, million a second", "pps|no loss": "Highest rate without loss, million a second",
	"pps|per CPU-second at 100 kpps": "Packets per CPU-second, million", "udp|received": "UDP from a pod's socket, received, million a second", "rungs|throughput": "One TCP stream by rung, Gbit/s",
	"rungs|flooded": "64-byte frames by rung, million a second", "nat|flooded": "Translated packets by number of sessions, million a second", "nat|opened": "New sessions, thousand a second",
	"idle|CPU": "Idle daemon, % of a core", "churn|age p99": "Age on arrival under churn, p99, µs", "pipeline|time": "Stages in memory, ns a packet",
}

// palette has as many colours as there are systems in one plot at most.
var palette = []color.RGBA{
	{0x1f, 0x77, 0xb4, 0xff}, {0xff, 0x7f, 0x0e, 0xff}, {0x2c, 0xa0, 0x2c, 0xff}, {0xd6, 0x27, 0x28, 0xff}, {0x94, 0x67, 0xbd, 0xff}, {0x8c, 0x56, 0x4b, 0xff},
	{0xe3, 0x77, 0xc2, 0xff}, {0x7f, 0x7f, 0x7f, 0xff}, {0xbc, 0xbd, 0x22, 0xff}, {0x17, 0xbe, 0xcf, 0xff}, {0x00, 0x00, 0x80, 0xff}, {0x80, 0x00, 0x00, 0xff},
}

func colour(i int) color.RGBA { return palette[i%len(palette)] }

var notInNames = regexp.MustCompile(`[^a-z0-9]+`)

func fileName(parts ...string) string {
	return strings.Trim(notInNames.ReplaceAllString(strings.ToLower(strings.Join(parts, "-")), "-"), "-") + ".svg"
}

// Plots writes SVG files into a folder and returns their names by scenario.
func Plots(dir string, r *result.Run) (map[string][]string, error) {
	files := map[string][]string{}
	var done []string
	for _, t := range tables(r) {
		key := t.scenario + "|" + t.metric
		title, wanted := plotted[key]
		if !wanted || slices.Contains(done, key) {
			continue
		}
		done = append(done, key)
		for _, g := range groups(r, t.scenario, t.metric) {
			name := fileName(t.scenario, t.metric, g)
			if err := bars(filepath.Join(dir, name), strings.TrimSuffix(title+": "+g, ": "), r, t.scenario, t.metric, g); err != nil {
				return nil, fmt.Errorf("plot %s: %w", name, err)
			}
			files[t.scenario] = append(files[t.scenario], name)
		}
	}
	var cases []string
	for _, c := range r.Curves {
		if slices.Contains(cases, c.Case) {
			continue
		}
		cases = append(cases, c.Case)
		for _, kind := range []string{"received", "latency"} {
			name := fileName(c.Scenario, c.Case, kind)
			if err := curves(filepath.Join(dir, name), kind, r, c.Case); err != nil {
				return nil, fmt.Errorf("plot %s: %w", name, err)
			}
			files[c.Scenario] = append(files[c.Scenario], name)
		}
	}
	return files, nil
}

// groups are what the names of cases begin with, up to their first slash, if there is more than one such beginning: a plot each. Otherwise one empty string.
func groups(r *result.Run, scenario, metric string) []string {
	var groups []string
	for _, s := range r.Series {
		if s.Scenario != scenario || s.Metric != metric {
			continue
		}
		if g, _, slash := strings.Cut(s.Case, "/"); !slash {
			return []string{""}
		} else if !slices.Contains(groups, g) {
			groups = append(groups, g)
		}
	}
	if len(groups) == 1 || scenario == "pipeline" {
		return []string{""}
	}
	return groups
}

// bars draws medians with their ranges, a group for each case whose name begins with the group's.
func bars(path, title string, r *result.Run, scenario, metric, group string) error {
	var cases, systems []string
	for _, s := range r.Series {
		if s.Scenario != scenario || s.Metric != metric || group != "" && !strings.HasPrefix(s.Case, group+"/") {
			continue
		}
		if !slices.Contains(cases, s.Case) {
			cases = append(cases, s.Case)
		}
		if !slices.Contains(systems, s.System) {
			systems = append(systems, s.System)
		}
	}
	p := newPlot(title)
	p.Y.Min = 0
	const share = 0.8 // of the distance between cases
	width := share / float64(len(systems))
	for i, system := range systems {
		fill := colour(i)
		for j, c := range cases {
			s := r.Find(result.Key{Scenario: scenario, Case: c, System: system, Metric: metric})
			if s == nil {
				continue
			}
			sum := result.Summarize(s.Values)
			left := float64(j) - share/2 + float64(i)*width
			bar, err := plotter.NewPolygon(plotter.XYs{{X: left, Y: 0}, {X: left, Y: sum.Median}, {X: left + width*0.9, Y: sum.Median}, {X: left + width*0.9, Y: 0}})
			if err != nil {
				return err
			}
			bar.Color, bar.LineStyle.Width = fill, 0
			middle := left + width*0.45
			span, err := plotter.NewLine(plotter.XYs{{X: middle, Y: sum.Min}, {X: middle, Y: sum.Max}})
			if err != nil {
				return err
			}
			span.Color, span.Width = color.Black, vg.Points(0.8)
			p.Add(bar, span)
		}
		p.Legend.Add(system, swatch{fill})
	}
	labels := slices.Clone(cases)
	for i := range labels {
		labels[i] = strings.TrimPrefix(labels[i], group+"/")
	}
	p.NominalX(labels...)
	p.X.Min, p.X.Max = -0.6, float64(len(cases))-0.4
	if len(cases) > 3 {
		p.X.Tick.Label.Rotation, p.X.Tick.Label.XAlign, p.X.Tick.Label.YAlign = 0.4, draw.XRight, draw.YCenter
	}
	// Room for the legend above the bars.
	p.Y.Max *= 1.1 + 0.07*float64(len(systems))
	return p.Save(vg.Length(max(6, 1.2*float64(len(cases))))*vg.Inch, 4.5*vg.Inch, path)
}

// swatch is a system's colour in the legend.
type swatch struct{ color.Color }

// Thumbnail draws it.
func (s swatch) Thumbnail(c *draw.Canvas) {
	c.FillPolygon(s.Color, []vg.Point{{X: c.Min.X, Y: c.Min.Y}, {X: c.Min.X, Y: c.Max.Y}, {X: c.Max.X, Y: c.Max.Y}, {X: c.Max.X, Y: c.Min.Y}})
}

// curves draws what was received, or the 99th percentile of the age on arrival, over what was offered.
func curves(path, kind string, r *result.Run, name string) error {
	title, unit := "Received of offered, million packets a second: "+name, "received"
	if kind == "latency" {
		title, unit = "Age on arrival, p99: "+name, "µs"
	}
	p := newPlot(title)
	p.X.Label.Text, p.Y.Label.Text = "offered, million packets a second", unit
	if kind == "latency" {
		p.Y.Scale, p.Y.Tick.Marker = plot.LogScale{}, plot.LogTicks{Prec: -1}
	}
	p.Legend.Top, p.Legend.Left = true, true
	i := 0
	for _, c := range r.Curves {
		if c.Case != name || len(c.Points) == 0 {
			continue
		}
		var xys plotter.XYs
		for _, pt := range c.Points {
			y := pt.Received / 1e6
			if kind == "latency" {
				y = max(1, float64(pt.P99)/1e3)
			}
			xys = append(xys, plotter.XY{X: pt.Offered / 1e6, Y: y})
		}
		line, points, err := plotter.NewLinePoints(xys)
		if err != nil {
			return err
		}
		line.Color, points.Color, points.Shape = colour(i), colour(i), plotutil.Shape(i)
		p.Add(line, points)
		p.Legend.Add(c.System, line, points)
		i++
	}
	if i == 0 {
		p.Y.Scale, p.Y.Tick.Marker = plot.LinearScale{}, plot.DefaultTicks{}
	}
	return p.Save(6.5*vg.Inch, 4.2*vg.Inch, path)
}

func newPlot(title string) *plot.Plot {
	p := plot.New()
	p.Title.Text = title
	p.BackgroundColor = color.White
	p.Legend.Top = true
	p.Legend.TextStyle.Font.Size = vg.Points(9)
	p.Add(plotter.NewGrid())
	return p
}
