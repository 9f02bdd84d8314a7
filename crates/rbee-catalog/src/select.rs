//! Which files of a repository make a model: pure, the same for a listing of the hub, a snapshot and a local folder.

use crate::error::Error;
use crate::names::shown;

/// The file with a sharded model's map of tensors.
pub(crate) const INDEX: &str = "model.safetensors.index.json";

/// Most shards of one model.
const MAX_SHARDS: usize = 2048;

/// What a reference asks for within a repository.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Wanted<'a> {
    /// The model, whatever it is made of.
    Model,
    /// A `.gguf` file by its path, or by its quantization.
    File(&'a str),
}

/// The files of a model.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Selection {
    /// A folder of files; with [`INDEX`] among them, the shards that it names come on top.
    Folder(Vec<String>),
    /// One `.gguf` file, or all its shards in order.
    Gguf(Vec<String>),
}

impl Selection {
    /// The files known so far.
    pub(crate) fn files(&self) -> &[String] {
        match self {
            Self::Folder(files) | Self::Gguf(files) => files,
        }
    }

    /// What tells this selection from others of the same commit, as a file name.
    pub(crate) fn key(&self) -> String {
        match self {
            Self::Folder(_) => "model".to_owned(),
            Self::Gguf(files) => files.first().map(|file| file.replace('/', "--")).unwrap_or_default(),
        }
    }

    /// Whether an index still has to be read to know all files.
    pub(crate) fn has_index(&self) -> bool {
        matches!(self, Self::Folder(files) if files.iter().any(|file| file == INDEX))
    }
}

/// Picks the files of a model out of all there are.
///
/// # Errors
/// [`Error::Ambiguous`], [`Error::NoSuchFile`].
pub(crate) fn select(model: &dyn std::fmt::Display, wanted: Wanted<'_>, all: &[&str]) -> Result<Selection, Error> {
    match wanted {
        Wanted::File(file) => gguf(model, file, all).map(Selection::Gguf),
        Wanted::Model => {
            let weights = safetensors(all);
            if !weights.is_empty() && all.contains(&"config.json") {
                let mut files: Vec<String> =
                    all.iter().filter(|path| is_beside(path)).map(|s| (*s).to_owned()).collect();
                files.extend(weights);
                files.sort_unstable();
                return Ok(Selection::Folder(files));
            }
            let mut groups = groups(all);
            match groups.len() {
                0 => Err(Error::NoSuchFile { model: model.to_string(), candidates: Vec::new() }),
                1 => complete(model, groups.swap_remove(0)).map(Selection::Gguf),
                _ => Err(Error::Ambiguous { model: model.to_string(), candidates: names(&groups) }),
            }
        }
    }
}

/// Every model that could be in these files: `None` for the folder, the path of each `.gguf` one.
pub(crate) fn every(all: &[&str]) -> Vec<Option<String>> {
    let folder = all.contains(&"config.json") && !safetensors(all).is_empty();
    let files = groups(all).into_iter().filter_map(|mut group| group.files.drain(..).next());
    folder.then_some(None).into_iter().chain(files.map(Some)).collect()
}

/// Whether a file is needed beside the weights.
fn is_beside(path: &str) -> bool {
    const EXACT: &[&str] = &[
        "config.json",
        "generation_config.json",
        "tokenizer.model",
        "special_tokens_map.json",
        "added_tokens.json",
        "vocab.json",
        "vocab.txt",
        "merges.txt",
        "spiece.model",
        "chat_template.jinja",
        "chat_template.json",
        "modules.json",
        "sentence_bert_config.json",
        "config_sentence_transformers.json",
    ];
    // `modules.json` names the folder, and the number before it is the module's place.
    let pooling = path
        .strip_suffix("_Pooling/config.json")
        .is_some_and(|place| place.len() == 1 && place.as_bytes()[0].is_ascii_digit());
    EXACT.contains(&path) || pooling || path.starts_with("tokenizer") && path.ends_with(".json") && !path.contains('/')
}

/// Whether one of a model's files can turn text into tokens.
pub(crate) fn is_tokenizer(path: &str) -> bool {
    ["tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model"].contains(&path)
}

/// The weights of the root, as transformers would choose them: the index (whose shards come later), else the one
/// file, else whatever there is.
fn safetensors(all: &[&str]) -> Vec<String> {
    if all.contains(&INDEX) {
        return vec![INDEX.to_owned()];
    }
    let mut root: Vec<&str> =
        all.iter().filter(|path| path.ends_with(".safetensors") && !path.contains('/')).copied().collect();
    if root.contains(&"model.safetensors") {
        root.retain(|path| *path == "model.safetensors");
    } else if root.iter().any(|path| path.starts_with("model-")) {
        root.retain(|path| path.starts_with("model-"));
    }
    root.into_iter().map(str::to_owned).collect()
}

/// The shards that an index names.
///
/// # Errors
/// What is wrong with it, in words.
pub(crate) fn shards(index: &[u8]) -> Result<Vec<String>, String> {
    #[derive(serde::Deserialize)]
    struct Index {
        weight_map: std::collections::HashMap<String, String>,
    }
    let index: Index = serde_json::from_slice(index).map_err(|error| error.to_string())?;
    let files: std::collections::BTreeSet<String> = index.weight_map.into_values().collect();
    if files.is_empty() || files.len() > MAX_SHARDS {
        return Err(format!("it names {} files", files.len()));
    }
    for file in &files {
        if file.contains('/') || !crate::names::path_fits(file) || !file.ends_with(".safetensors") {
            return Err(format!("`{}` is not the name of a file beside it", shown(file)));
        }
    }
    Ok(files.into_iter().collect())
}

/// A `.gguf` file or a set of shards that belong together.
#[derive(Debug, PartialEq, Eq)]
struct Group {
    /// The path without `-00001-of-0000N` and `.gguf`.
    base: String,
    /// How many shards there have to be.
    total: u32,
    files: Vec<String>,
}

/// The groups of all `.gguf` files that are models by themselves.
fn groups(all: &[&str]) -> Vec<Group> {
    let mut groups: Vec<Group> = Vec::new();
    let mut sorted: Vec<&str> =
        all.iter().filter(|path| path.to_ascii_lowercase().ends_with(".gguf")).copied().collect();
    sorted.sort_unstable();
    for path in sorted {
        let name = path.rsplit('/').next().unwrap_or(path).to_ascii_lowercase();
        // What completes another model (the eyes of one that sees) or belongs to its making.
        if name.starts_with("mmproj") || name.contains("imatrix") {
            continue;
        }
        let (base, total) = split(path);
        match groups.iter_mut().find(|group| group.base == base && group.total == total) {
            Some(group) => group.files.push(path.to_owned()),
            None => groups.push(Group { base: base.to_owned(), total, files: vec![path.to_owned()] }),
        }
    }
    groups
}

/// The base of a path and how many shards it belongs to.
fn split(path: &str) -> (&str, u32) {
    let stem = path.get(..path.len().saturating_sub(5)).unwrap_or(path);
    let shard = stem.rsplit_once("-of-").and_then(|(rest, total)| {
        let (base, number) = rest.rsplit_once('-')?;
        let digits = |text: &str| text.len() == 5 && text.bytes().all(|b| b.is_ascii_digit());
        (digits(number) && digits(total)).then(|| Some((base, total.parse().ok()?)))?
    });
    shard.unwrap_or((stem, 1))
}

fn complete(model: &dyn std::fmt::Display, group: Group) -> Result<Vec<String>, Error> {
    if group.files.len() == group.total as usize {
        return Ok(group.files);
    }
    let there = format!("{} ({} of {} shards)", group.base, group.files.len(), group.total);
    Err(Error::NoSuchFile { model: model.to_string(), candidates: vec![there] })
}

fn gguf(model: &dyn std::fmt::Display, file: &str, all: &[&str]) -> Result<Vec<String>, Error> {
    let groups = groups(all);
    let candidates = names(&groups);
    if file.to_ascii_lowercase().ends_with(".gguf") {
        if let Some(group) = groups.into_iter().find(|group| group.files.iter().any(|path| path == file)) {
            return complete(model, group);
        }
        return match all.contains(&file) {
            // Named outright, it may also be one that is no model by itself.
            true => Ok(vec![file.to_owned()]),
            false => Err(Error::NoSuchFile { model: model.to_string(), candidates }),
        };
    }
    let mut matching: Vec<Group> = groups.into_iter().filter(|group| has_quantization(&group.base, file)).collect();
    // `Q4_K_M` means the plain one where there is a dynamic `UD-Q4_K_M` as well.
    if matching.len() > 1 && !file.to_ascii_uppercase().starts_with("UD-") {
        let dynamic = |group: &Group| has_quantization(&group.base, &format!("UD-{file}"));
        if matching.iter().any(|group| !dynamic(group)) {
            matching.retain(|group| !dynamic(group));
        }
    }
    match matching.len() {
        0 => Err(Error::NoSuchFile { model: model.to_string(), candidates }),
        1 => complete(model, matching.swap_remove(0)),
        _ => Err(Error::Ambiguous {
            model: model.to_string(),
            candidates: matching.into_iter().filter_map(|mut group| group.files.drain(..).next()).collect(),
        }),
    }
}

/// Whether a name has this quantization, in any case, between separators: `Q4_K` is not in `Q4_K_M`.
fn has_quantization(base: &str, quantization: &str) -> bool {
    let (base, wanted) = (base.to_ascii_uppercase(), quantization.to_ascii_uppercase());
    base.match_indices(&wanted).any(|(at, _)| {
        let before = base[..at].chars().next_back();
        let after = base[at + wanted.len()..].chars().next();
        before.is_none_or(|c| "-._/".contains(c)) && after.is_none_or(|c| "-./".contains(c))
    })
}

/// What the groups can be called by: the quantization if their names end in one, else the path.
fn names(groups: &[Group]) -> Vec<String> {
    let mut names: Vec<String> = groups
        .iter()
        .map(|group| {
            let name = group.base.rsplit('/').next().unwrap_or(&group.base);
            let last = name.rsplit(['-', '.']).next().unwrap_or(name);
            let quantization = last.to_ascii_uppercase();
            let is_one =
                ["Q", "IQ", "F16", "F32", "BF16", "TQ", "MXFP"].iter().any(|start| quantization.starts_with(start))
                    && quantization.bytes().any(|b| b.is_ascii_digit());
            let unique = groups.iter().filter(|other| has_quantization(&other.base, last)).count() == 1;
            match (is_one && unique, group.files.first()) {
                (true, _) | (_, None) => last.to_owned(),
                (false, Some(file)) => file.clone(),
            }
        })
        .collect();
    names.truncate(64);
    names
}

#[cfg(test)]
mod tests {
    use super::*;

    fn chosen(wanted: Option<&str>, all: &[&str]) -> String {
        let wanted = wanted.map_or(Wanted::Model, Wanted::File);
        match select(&"m", wanted, all) {
            Ok(Selection::Folder(files)) => format!("folder {}", files.join(" ")),
            Ok(Selection::Gguf(files)) => format!("gguf {}", files.join(" ")),
            Err(Error::Ambiguous { candidates, .. }) => format!("ambiguous {}", candidates.join(" ")),
            Err(Error::NoSuchFile { candidates, .. }) => format!("none of {}", candidates.join(" ")),
            Err(other) => other.to_string(),
        }
    }

    #[test]
    fn a_model_of_a_folder_is_what_loads_it_and_no_more() {
        let all = [
            "README.md",
            "config.json",
            "consolidated.safetensors",
            "image.png",
            "model.safetensors",
            "onnx/model.onnx",
            "original/params.json",
            "pytorch_model.bin",
            "tokenizer.json",
            "tokenizer_config.json",
            "1_Pooling/config.json",
            "2_Dense/config.json",
            "old/1_Pooling/config.json",
            "modules.json",
            "sentence_bert_config.json",
            "x.gguf",
        ];
        assert_eq!(
            chosen(None, &all),
            "folder 1_Pooling/config.json config.json model.safetensors modules.json sentence_bert_config.json tokenizer.json tokenizer_config.json"
        );
        let sharded = ["config.json", "model-00001-of-00002.safetensors", INDEX, "consolidated-00001.safetensors"];
        assert_eq!(chosen(None, &sharded), format!("folder config.json {INDEX}"));
        assert_eq!(chosen(None, &["config.json", "a.safetensors"]), "folder a.safetensors config.json");
        assert_eq!(chosen(None, &["config.json", "pytorch_model.bin"]), "none of ");
    }

    #[test]
    fn a_quantization_picks_its_file_with_all_shards() {
        let all = [
            "m-Q4_K_M.gguf",
            "m-q4_k_s.gguf",
            "m-UD-Q4_K_M.gguf",
            "m-IQ4_K_M.gguf",
            "mmproj-Q8_0.gguf",
            "Q8_0/m-Q8_0-00002-of-00002.gguf",
            "Q8_0/m-Q8_0-00001-of-00002.gguf",
            "m.F16-00001-of-00002.gguf",
        ];
        for (wanted, want) in [
            ("q4_k_m", "gguf m-Q4_K_M.gguf"),
            ("UD-Q4_K_M", "gguf m-UD-Q4_K_M.gguf"),
            ("Q4_K_S", "gguf m-q4_k_s.gguf"),
            ("Q8_0", "gguf Q8_0/m-Q8_0-00001-of-00002.gguf Q8_0/m-Q8_0-00002-of-00002.gguf"),
            ("Q8_0/m-Q8_0-00002-of-00002.gguf", "gguf Q8_0/m-Q8_0-00001-of-00002.gguf Q8_0/m-Q8_0-00002-of-00002.gguf"),
            ("F16", "none of m.F16 (1 of 2 shards)"),
            ("mmproj-Q8_0.gguf", "gguf mmproj-Q8_0.gguf"),
        ] {
            assert_eq!(chosen(Some(wanted), &all), want, "{wanted}");
        }
        assert!(chosen(Some("Q4_K"), &all).starts_with("none of "));
        assert!(chosen(Some("other.gguf"), &all).starts_with("none of "));
        assert_eq!(chosen(None, &["m-Q4_K_M.gguf", "m-Q8_0.gguf"]), "ambiguous Q4_K_M Q8_0");
        assert_eq!(chosen(None, &["m-Q4_K_M.gguf"]), "gguf m-Q4_K_M.gguf");
        assert_eq!(chosen(Some("Q8_0"), &["a-Q8_0.gguf", "b-Q8_0.gguf"]), "ambiguous a-Q8_0.gguf b-Q8_0.gguf");
    }

    #[test]
    fn an_index_names_files_beside_it() {
        let index = |file: &str| {
            shards(format!(r#"{{"metadata":{{}},"weight_map":{{"a":"{file}","b":"{file}"}}}}"#).as_bytes())
        };
        assert_eq!(index("model-1.safetensors").unwrap(), ["model-1.safetensors"]);
        for file in ["../x.safetensors", "/x.safetensors", "a/x.safetensors", "x.bin", ""] {
            assert!(index(file).is_err(), "{file}");
        }
        assert!(shards(b"{}").is_err() && shards(br#"{"weight_map":{}}"#).is_err());
    }
}
