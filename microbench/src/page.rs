//! A report as data, and its two renderings: one self-contained HTML file, and Markdown beside its pictures.

use std::fmt::Write;

#[derive(Clone, Debug, Default)]
pub(crate) struct Page {
    pub(crate) title: String,
    pub(crate) sections: Vec<Section>,
}

#[derive(Clone, Debug, Default)]
pub(crate) struct Section {
    pub(crate) heading: String,
    pub(crate) paragraphs: Vec<String>,
    pub(crate) figure: Option<Figure>,
    pub(crate) table: Option<Table>,
    /// Long tables start folded.
    pub(crate) folded: bool,
}

#[derive(Clone, Debug)]
pub(crate) struct Figure {
    /// File name of the SVG, without a directory.
    pub(crate) file: String,
    pub(crate) alt: String,
    pub(crate) svg: String,
}

#[derive(Clone, Debug, Default)]
pub(crate) struct Table {
    pub(crate) header: Vec<String>,
    pub(crate) rows: Vec<Vec<String>>,
    /// Columns before this one are text, the others numbers.
    pub(crate) text_columns: usize,
}

const CSS: &str = "\
:root{color-scheme:light dark;--bg:#fff;--fg:#1f2328;--soft:#656d76;--line:#d8dee4;--stripe:#f6f8fa;--pass:#1a7f37;--miss:#cf222e}
@media(prefers-color-scheme:dark){:root{--bg:#0d1117;--fg:#d1d7e0;--soft:#9198a1;--line:#30363d;--stripe:#151b23;--pass:#3fb950;--miss:#f85149}}
body{background:var(--bg);color:var(--fg);font:16px/1.6 system-ui,sans-serif;max-width:1080px;margin:0 auto;padding:2rem 1rem 4rem}
h1{line-height:1.2}h2{margin-top:2.6rem;border-bottom:1px solid var(--line);padding-bottom:.3rem}
p{max-width:75ch}figure{margin:1rem 0}figure svg{width:100%;height:auto}
.scroll{overflow-x:auto}table{border-collapse:collapse;font-size:.875rem;width:100%}
th,td{padding:.3rem .7rem;border-bottom:1px solid var(--line);text-align:left;white-space:nowrap}
td.text{white-space:normal;min-width:10rem}
th{color:var(--soft);font-weight:600}.n{text-align:right;font-variant-numeric:tabular-nums}
tbody tr:nth-child(even){background:var(--stripe)}summary{cursor:pointer;color:var(--soft)}
.pass{color:var(--pass);font-weight:600}.miss{color:var(--miss);font-weight:600}code{font-size:.9em}";

impl Page {
    /// One file, nothing fetched from anywhere.
    pub(crate) fn html(&self) -> String {
        let mut out = format!(
            "<!doctype html>\n<html lang=\"en\"><head><meta charset=\"utf-8\">\
             <meta name=\"viewport\" content=\"width=device-width,initial-scale=1\">\
             <title>{0}</title>\n<style>\n{CSS}\n</style></head>\n<body>\n<h1>{0}</h1>\n",
            escaped(&self.title)
        );
        for section in &self.sections {
            if !section.heading.is_empty() {
                let _ = writeln!(out, "<h2>{}</h2>", escaped(&section.heading));
            }
            for paragraph in &section.paragraphs {
                let _ = writeln!(out, "<p>{}</p>", coded(&escaped(paragraph)));
            }
            if let Some(figure) = &section.figure {
                let _ = writeln!(out, "<figure>{}</figure>", figure.svg);
            }
            if let Some(table) = &section.table {
                let (open, close) = if section.folded {
                    (format!("<details><summary>{} rows</summary>", table.rows.len()), "</details>")
                } else {
                    (String::new(), "")
                };
                let _ = writeln!(out, "{open}<div class=\"scroll\">{}</div>{close}", table.html());
            }
        }
        out.push_str("</body></html>\n");
        out
    }

    /// Refers to the pictures by file name.
    pub(crate) fn markdown(&self) -> String {
        let mut out = format!("# {}\n", self.title);
        for section in &self.sections {
            if !section.heading.is_empty() {
                let _ = write!(out, "\n## {}\n", section.heading);
            }
            for paragraph in &section.paragraphs {
                let _ = write!(out, "\n{paragraph}\n");
            }
            if let Some(figure) = &section.figure {
                let _ = write!(out, "\n![{}]({})\n", figure.alt, figure.file);
            }
            if let Some(table) = &section.table {
                let _ = write!(out, "\n{}", table.markdown());
            }
        }
        out
    }

    pub(crate) fn figures(&self) -> impl Iterator<Item = &Figure> {
        self.sections.iter().filter_map(|section| section.figure.as_ref())
    }
}

impl Table {
    fn html(&self) -> String {
        let class = |column: usize| if column < self.text_columns { "text" } else { "n" };
        let mut out = String::from("<table><thead><tr>");
        for (column, name) in self.header.iter().enumerate() {
            let _ = write!(out, "<th class=\"{}\">{}</th>", class(column), escaped(name));
        }
        out.push_str("</tr></thead><tbody>\n");
        for row in &self.rows {
            out.push_str("<tr>");
            for (column, cell) in row.iter().enumerate() {
                let verdict = match cell.as_str() {
                    "PASS" => " pass",
                    "MISS" => " miss",
                    _ => "",
                };
                let _ = write!(out, "<td class=\"{}{verdict}\">{}</td>", class(column), coded(&escaped(cell)));
            }
            out.push_str("</tr>\n");
        }
        out.push_str("</tbody></table>");
        out
    }

    fn markdown(&self) -> String {
        let mut out = format!("| {} |\n|", self.header.join(" | "));
        for column in 0..self.header.len() {
            out.push_str(if column < self.text_columns { "---|" } else { "---:|" });
        }
        out.push('\n');
        for row in &self.rows {
            let cells: Vec<String> = row.iter().map(|cell| cell.replace('|', "\\|")).collect();
            let _ = writeln!(out, "| {} |", cells.join(" | "));
        }
        out
    }
}

fn escaped(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;")
}

/// Backquotes become code, the one piece of Markdown our paragraphs use.
fn coded(text: &str) -> String {
    let mut out = String::new();
    for (position, piece) in text.split('`').enumerate() {
        match position % 2 {
            1 => out += &format!("<code>{piece}</code>"),
            _ => out += piece,
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    fn page() -> Page {
        let table = Table {
            header: vec!["what".into(), "p50".into()],
            rows: vec![vec!["a|b <c>".into(), "PASS".into()]],
            text_columns: 1,
        };
        let figure = Figure { file: "local.svg".into(), alt: "local".into(), svg: "<svg></svg>".into() };
        let section = Section {
            heading: "Local".into(),
            paragraphs: vec!["run `praas-bench`".into()],
            figure: Some(figure),
            table: Some(table),
            folded: false,
        };
        Page { title: "Report".into(), sections: vec![section] }
    }

    #[test]
    fn html_stands_alone_and_escapes_what_is_not_ours() {
        let html = page().html();
        assert!(
            html.contains("<svg></svg>") && html.contains("a|b &lt;c&gt;") && html.contains("<code>praas-bench</code>")
        );
        assert!(!html.contains("src=") && !html.contains("href="), "nothing is fetched");
    }

    #[test]
    fn markdown_refers_to_pictures_and_keeps_its_columns() {
        let markdown = page().markdown();
        assert!(
            markdown.contains("![local](local.svg)")
                && markdown.contains("| a\\|b <c> | PASS |")
                && markdown.contains("|---|---:|")
        );
    }
}
